"""Proof on the user's own machine that faults end as promised: nothing lost, one clear error.

`proof.py` runs the catalogue; a fault is a function of one of the `by_*` files, which works on the
`Ground` of `ground.py`: a copy of one interrupted run. `lives.py` starts the program in processes
of its own, `arming.py` is what happens in such a process so that the fault comes about.
"""
