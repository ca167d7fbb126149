"""Programs compiled ahead of time, for machines that are not there.

`topology` names a machine. `hlo` reads the text of a compiled program, `costs`,
`groups` and `traffic` count in it, and `roofline` turns counts into seconds.
"""
