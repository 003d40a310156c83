"""`sinks chat` in a pipe from end to end, its commands, and its Ctrl-C."""

import io
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sinks.cli import main as cli
from sinks.cli.terminal.commands import COMMANDS, Quit, answer, talk
from sinks.cli.terminal.conversation import Conversation
from sinks.cli.terminal.screen import Screen
from sinks.cli.terminal.stopping import PATIENCE, Stopper
from sinks.errors import InvalidInput, SnapshotError
from sinks.models.load import load
from sinks.stream.sampling import Sampling
from sinks.stream.session import Session
from tests.reading.tiny import tiny_folder
from tests.stream.templates import LETTERS, chat_folder, chat_loaded

SYSTEM = "Be kind."
WINDOW = 60


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a chat template, as a folder, in float32."""
    return chat_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def chat(model: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run the command with `said` on its standard input. Returns the exit status."""

    def run(said: bytes, *flags: str, folder: Path = model) -> int:
        monkeypatch.setattr(cli, "_root", lambda: None)  # the checker balks: typer's context is no typer.Context
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(said), encoding="ascii"))
        return cli.main(["chat", str(folder), "--max-tokens", "6", *flags])

    return run


class Spoken(Screen):
    """A screen for tests: what was written, as text."""

    def __init__(self, lively: bool = True) -> None:
        super().__init__(lively)
        self.said, self.notes = "", list[str]()
        self.on_piece: Callable[[], None] = lambda: None

    def piece(self, text: str) -> None:
        self.said += text
        self.on_piece()

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def conversation() -> Conversation:
    """A dialogue with the tiny model, which says letters."""
    stopper = Stopper()
    session = Session.open(chat_loaded(), window=WINDOW, system=SYSTEM, pin="system", on_evict=stopper.heard)
    return Conversation(session, LETTERS, 8, Spoken(), stopper)


def said_by(conversation: Conversation, message: str) -> str:
    """What is shown in answer to this line."""
    screen = conversation.screen
    assert isinstance(screen, Spoken)
    screen.said, screen.notes = "", []
    answer(conversation, message)
    return screen.said


# In a pipe


def test_a_pipe_gets_the_answers_and_nothing_else(
    chat: Callable[..., int], model: Path, capsys: pytest.CaptureFixture[str]
):
    messages = ["hello", "naïve 東京", "\x1b[31m"]
    said = "\n\n".join(messages).encode() + b"\r\n\xff\n"
    assert chat(said, "--system", SYSTEM, "--window", "40", "--seed", "5") == 0
    told = capsys.readouterr()
    session = Session.open(load(model), window=40, system=SYSTEM, pin="system")
    sampling = Sampling(0.7, top_p=0.9, repetition_penalty=1.1, seed=5)
    expected = ""
    for message in [*messages, "\ufffd"]:
        expected += "".join(session.say(message, max_tokens=6, sampling=sampling)) + "\n"
        sampling = Sampling(0.7, top_p=0.9, repetition_penalty=1.1)
    assert told.out == expected
    assert told.err.count("cut after 6 tokens") == 4 and "\x1b" not in told.err


@pytest.mark.parametrize(
    ("line", "status", "message"),
    [
        ("/nonsense", 2, "/nonsense is no command: there are /visible, /more, /save, "),
        ("/save", 2, "/save needs something behind it: /save FILE"),
        ("/visible now", 2, "/visible takes nothing behind it, and 'now' was given"),
        ("/window many", 2, "a window is a whole number"),
        ("/window 0", 2, "window=0 is too small"),
        ("/load nothing", 2, "nothing cannot be read"),
        ("/back a", 2, "no moment called a is kept: there are none"),
        ("/more", 2, "no unfinished answer"),
    ],
)
def test_a_mistake_in_a_pipe_ends_it(
    line: str, status: int, message: str, chat: Callable[..., int], capsys: pytest.CaptureFixture[str]
):
    assert chat(f"{line}\nhello\n".encode()) == status
    told = capsys.readouterr()
    assert message in told.err and not told.out


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--temperature", "-1"], 2, "temperature=-1.0"),
        (["--max-tokens", "-1"], 2, "--max-tokens -1: give a number of tokens, or 0"),
        (["--sinks", "some"], 2, "--sinks some: give a whole number, or auto"),
        (["--window", "10000"], 2, "trained on 8192"),
        (["--pin"], 2, "no system prompt to pin"),
        (["--load", "x", "--window", "9", "--no-pin"], 2, "--window, --pin: a saved moment brings its own"),
        (["--load", "nothing"], 2, "nothing cannot be read"),
        (["--dtype", "int3"], 2, "int3"),
        (["--system", "\udcff"], 2, "the system prompt: character 0 of this text is half of a surrogate pair"),
    ],
)
def test_flags_that_cannot_be(
    flags: list[str], status: int, message: str, chat: Callable[..., int], capsys: pytest.CaptureFixture[str]
):
    assert chat(b"hello\n", *flags) == status
    told = capsys.readouterr()
    assert message in told.err and not told.out


def test_a_model_without_a_template(chat: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert chat(b"hello\n", "--window", "50", folder=tiny_folder(tmp_path)) == 1
    assert "has no chat template" in capsys.readouterr().err


def test_saved_in_one_process_and_gone_on_with_in_another(
    chat: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "moment"
    flags = ("--window", "50", "--no-pin", "--system", SYSTEM)
    assert chat(f"one\n/save {file}\n".encode(), *flags) == 0
    first = capsys.readouterr().out
    assert chat(b"one\ntwo\n", *flags) == 0
    both = capsys.readouterr().out
    assert both.startswith(first) and chat(b"two\n", "--load", str(file)) == 0
    assert capsys.readouterr().out == both.removeprefix(first) != ""


@pytest.mark.slow
def test_three_hundred_turns_in_a_window_of_64(chat: Callable[..., int], capsys: pytest.CaptureFixture[str]):
    lines = "".join(f"message {number}\n" for number in range(300))
    assert chat(f"{lines}/visible\n".encode(), "--window", "64", "--system", SYSTEM) == 0
    told = capsys.readouterr().out
    assert told.count("tokens let go ...]") == 1 and "message 299" in told and "message 290" not in told
    assert f"<|im_start|>system\n{SYSTEM}<|im_end|>" in told


# Commands


def test_visible_shows_what_was_let_go(conversation: Conversation):
    for number in range(5):
        said_by(conversation, f"message {number}")
    session = conversation.session
    first, recent = session.visible.spans
    shown = said_by(conversation, "/visible")
    assert shown == (
        f"{first.text}\n[... {session.evicted:,} tokens let go ...]\n{recent.text}\n"
        f"[{session.plan.capacity:,} of {session.seen:,} tokens visible]\n"
    )


def test_forks_and_the_way_back(conversation: Conversation):
    said_by(conversation, "first")
    said_by(conversation, "/fork")
    said_by(conversation, "/fork before lunch")
    expected = said_by(conversation, "second")
    assert said_by(conversation, "/forks").splitlines()[1].startswith("before lunch: ")
    for name in ("1", "before lunch", "1"):
        said_by(conversation, f"/back {name}")
        assert said_by(conversation, "second") == expected
    for line, message in (("/fork 1", "called 1 is kept already"), ("/back 7", "there are 1, before lunch")):
        with pytest.raises(InvalidInput, match=message):
            answer(conversation, line)


def test_save_load_and_forget(conversation: Conversation, tmp_path: Path):
    conversation.sampling = Sampling(1.0, seed=3, logit_bias=LETTERS.logit_bias)
    begun = said_by(conversation, "first")
    said_by(conversation, f"/save {tmp_path / 'a moment'}")
    expected = said_by(conversation, "second")
    said_by(conversation, f"/load {tmp_path / 'a moment'}")
    assert said_by(conversation, "second") == expected
    said_by(conversation, "/forget")
    assert conversation.session.seen == 0
    assert said_by(conversation, "first") == begun and SYSTEM in said_by(conversation, "/visible")
    with pytest.raises(SnapshotError):
        answer(conversation, f"/save {tmp_path / 'no' / 'folder'}")


def test_a_window_before_anything_was_read(conversation: Conversation):
    said_by(conversation, "first")
    screen = conversation.screen
    assert isinstance(screen, Spoken)
    for before, said in (("/visible", True), ("/forget", False)):
        said_by(conversation, before)
        said_by(conversation, "/window 20")
        assert ("was read anew" in screen.notes[0]) == said


def test_another_window(conversation: Conversation):
    for number in range(5):
        said_by(conversation, f"message {number}")
    recent = conversation.session.visible.spans[1].ids
    said_by(conversation, "/window 20")
    session = conversation.session
    assert session.plan.window == 20 and session.visible.spans[1].ids == recent[-20:]
    assert said_by(conversation, "and then?") and session.visible.spans[0].text.endswith(f"{SYSTEM}<|im_end|>\n")


def test_more_goes_on_with_a_cut_answer(conversation: Conversation):
    whole = Conversation(conversation.session.fork(), LETTERS, 16, Spoken(), Stopper())
    expected = said_by(whole, "first")
    said = said_by(conversation, "first").rstrip("\n") + said_by(conversation, "/more")
    assert said == expected and conversation.session.visible == whole.session.visible


def test_two_slashes_are_one_and_several_lines_no_command(conversation: Conversation):
    said_by(conversation, "//quit")
    assert "user\n/quit<|im_end|>" in conversation.session.visible.text
    said_by(conversation, "/quit\nis how one leaves")
    assert "user\n/quit\nis how" in conversation.session.visible.text
    with pytest.raises(Quit):
        answer(conversation, "/quit")


def test_help_names_every_command(conversation: Conversation):
    told = said_by(conversation, "/help")
    assert all(f"/{name}" in told and command.help in told for name, command in COMMANDS.items())


def test_at_a_terminal_a_mistake_is_one_line_and_the_conversation_goes_on(conversation: Conversation):
    talk(conversation, iter(["/nonsense", "/load nothing", "hello", "/quit", "never said"]))
    screen = conversation.screen
    assert isinstance(screen, Spoken) and len(screen.said) == 9
    assert screen.notes[0].startswith("sinks: /nonsense is no command") and "nothing cannot be read" in screen.notes[1]
    assert "never said" not in conversation.session.visible.text
    conversation.screen = Spoken(lively=False)
    with pytest.raises(InvalidInput):
        talk(conversation, iter(["/nonsense"]))


# Ctrl-C


def test_ctrl_c_stops_the_answer_and_nothing_else(conversation: Conversation):
    screen, before = conversation.screen, signal.getsignal(signal.SIGINT)
    assert isinstance(screen, Spoken)
    conversation.max_tokens = None  # it would never end
    screen.on_piece = lambda: signal.raise_signal(signal.SIGINT) if len(screen.said) == 7 else None
    assert len(said_by(conversation, "hello")) == 8  # seven letters and the end of the line
    assert signal.getsignal(signal.SIGINT) is before
    screen.on_piece, conversation.max_tokens = (lambda: None), 3
    assert len(said_by(conversation, "/more")) == len(said_by(conversation, "and?")) == 4


def test_ctrl_c_stops_the_reading_of_a_long_message(conversation: Conversation, monkeypatch: pytest.MonkeyPatch):
    session, passes = conversation.session, list[int]()
    true = session._forward

    def forward(ids: list[int], logits: bool) -> torch.Tensor:
        passes.append(len(ids))
        if len(passes) == 3:
            signal.raise_signal(signal.SIGINT)
        return true(ids, logits)

    monkeypatch.setattr(session, "_forward", forward)
    assert said_by(conversation, "long " * 1000) == ""
    assert len(passes) == 3 and session.seen == 3 * session.chunk
    assert isinstance(conversation.screen, Spoken)
    assert conversation.screen.notes[0].startswith("stopped while reading: 768 tokens")
    assert len(said_by(conversation, "hello")) == 9


def test_ctrl_c_again_and_again_leaves(conversation: Conversation):
    screen = conversation.screen
    assert isinstance(screen, Spoken)
    screen.on_piece = lambda: [signal.raise_signal(signal.SIGINT) for _ in range(PATIENCE)] and None
    with pytest.raises(KeyboardInterrupt):
        answer(conversation, "hello")


def test_ctrl_c_between_an_answer_and_the_prompt_is_nothing_to_worry_about():
    stopper = Stopper()

    def read(prompt: str) -> str:
        signal.raise_signal(signal.SIGINT)
        return prompt

    with stopper.watching():
        signal.raise_signal(signal.SIGINT)
        assert stopper.asked
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                stopper.prompting(read)("> ")
        signal.raise_signal(signal.SIGINT)


def test_a_stream_that_is_no_dialogue_is_not_taken_up(conversation: Conversation, tmp_path: Path):
    said_by(conversation, "hello")
    before = conversation.session
    other = Session.open(before.loaded, window=WINDOW)
    other.feed("no dialogue")
    other.save(tmp_path / "stream")
    with pytest.raises(InvalidInput, match="no dialogue: go on with it by sinks stream --load"):
        answer(conversation, f"/load {tmp_path / 'stream'}")
    assert conversation.session is before and before.in_dialogue
