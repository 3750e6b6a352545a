"""The command line: one file a verb, imported only when its verb is called.

`base` turns a typed dataclass into flags and runs the verb; `usage` writes its help page; `display` shows the event
stream to people, `failures` the errors.
"""
