"""One decode step of a Llama-shaped model without what a module tree costs."""
