"""Speaks to eyes: tables, words, pictures and files made of measured numbers. The only room with matplotlib."""
