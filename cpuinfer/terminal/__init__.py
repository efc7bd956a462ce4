"""The chat in a terminal: what a person types, what the model answers, and how both are shown.

`loop.py` is the chat; `reader.py` reads messages, `screen.py` shows replies, `slash.py` has the
/commands.
"""
