"""Programs compiled ahead of time, for machines that are not there.

`topology` names a machine, `program` makes the training step from a config,
`compilation` compiles it and says what it takes: `hlo` reads the text of the
compiled program, `costs`, `groups` and `traffic` count in it, `roofline` turns
counts into seconds. `jobs` runs several compilations and remembers what came
out, `search` lists layouts and ranks them.
"""
