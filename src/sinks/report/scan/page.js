(()=>{const root=document.documentElement,button=document.getElementById("theme");
if(button){const dark=()=>root.dataset.theme?root.dataset.theme==="dark":matchMedia("(prefers-color-scheme:dark)").matches;
const name=()=>button.textContent=dark()?"Light":"Dark";button.hidden=false;name();
button.onclick=()=>{root.dataset.theme=dark()?"light":"dark";name()}}
const tip=document.createElement("div");tip.id="tip";tip.hidden=true;document.body.append(tip);
document.addEventListener("pointermove",event=>{const at=event.target.closest&&event.target.closest(".hits>*");
if(!at){tip.hidden=true;return}
const title=at.querySelector("title");if(title){at.dataset.tip=title.textContent;title.remove()}
tip.textContent=at.dataset.tip;tip.hidden=false;
tip.style.left=Math.max(4,Math.min(event.clientX+14,innerWidth-tip.offsetWidth-8))+"px";
tip.style.top=Math.max(4,event.clientY-tip.offsetHeight-12)+"px"})})();
