"""The choice of the next token inside a captured step: penalties, a race of logits and noise, its verification."""
