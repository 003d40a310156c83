"""What is caused: reversible edits of a running model, and what each does beside its matched control."""
