"""Speech recognition: the audio of a shard's videos becomes segments with times.

`shard` makes the tables, `pipeline` keeps the model busy, `speech` finds what is spoken, `engine` is the only module
that knows faster-whisper, `model` finds its files, `safety` judges what it wrote. Nothing heavy is imported here: rules
read `VERSION`.
"""

VERSION = 2  # bump when the same audio and settings give other results
