"""Reads in Triton's TTGIR for Hopper whether memory is filled anew while something still reads it.

`overwritten`: a product of a warp group (wgmma) runs on while the loop goes on. Triton 3.6 gives a tile that
also goes through registers one buffer and starts its next load without a wait for the product, so that the
product now and then reads half of the next tile.

`released_early`: a load from shared memory to registers is under way until something uses what it brings. A
warp that says before that the buffer is free can see the copy engine's next tile in it: a query of ours was
the next tile's in one of some thousand rows where tiles are short.

No interpreter and no memory checker sees either.
"""

from __future__ import annotations

import re

SLOT = re.compile(r"= ttg\.memdesc_index (%\w+)")
VIEW = re.compile(r"(%\w+) = ttg\.(?:memdesc_\w+) (%\w+)")
ALLOCATION = re.compile(r"(%\w+) = ttg\.local_alloc : .*memdesc<(\d+)x")
PRODUCT = re.compile(r"= ttng\.warp_group_dot (%\w+), (%\w+), .*isAsync = true")
WAIT = re.compile(r"ttng\.warp_group_dot_wait .*pendings = (\d+)")
COPY = re.compile(
    r"async_tma_copy_global_to_local %\w+\[.*?\] (%\w+),|async_copy_global_to_local %\w+, (%\w+)"
)


def overwritten(ttgir: str) -> list[str]:
    """Buffers of a single tile that some loop loads anew while a product may still read them, by name."""
    view_of = dict(VIEW.findall(ttgir))
    indexed = set(SLOT.findall(ttgir))
    several = {name for name, slots in ALLOCATION.findall(ttgir) if name in indexed and int(slots) > 1}

    def buffer(name: str) -> str:
        while name in view_of:
            name = view_of[name]
        return name

    found: set[str] = set()
    loops: list[tuple[int, list]] = []  # of the loops that are open: indentation, operations
    for line in ttgir.splitlines():
        indentation = len(line) - len(line.lstrip())
        if loops and indentation == loops[-1][0] and line.lstrip().startswith("}"):
            found |= _overwritten(loops.pop()[1])
        if "scf.for" in line:
            loops.append((indentation, []))
        operation = None
        if product := PRODUCT.search(line):
            operation = "product", {buffer(name) for name in product.groups()}
        elif wait := WAIT.search(line):
            operation = "wait", int(wait[1])
        elif copy := COPY.search(line):
            operation = "copy", buffer(copy[1] or copy[2])
        for _, operations in loops if operation else ():
            operations.append(operation)
    return sorted(found - several)


def _overwritten(body: list) -> set[str]:
    found, pending = set(), []
    for kind, what in body * 2:  # twice: a product may be pending from one turn to the next
        if kind == "product":
            pending.append(what)
        elif kind == "wait":
            pending = pending[max(0, len(pending) - what) :]
        else:
            found |= {what for read in pending if what in read}
    return found


LOAD = re.compile(r"(%[\w]+) = ttg\.local_load ")
USES = ("warp_group_dot ", "local_store")


def released_early(ttgir: str) -> list[str]:
    """Values loaded from shared memory that reach no product and no store before a barrier is arrived at."""
    found: list[str] = []
    pending: dict[str, set[str]] = {}  # loaded value: it and what is computed from it
    for line in ttgir.splitlines():
        text = line.partition(" loc(")[0]
        names = set(re.findall(r"%\w+", text))
        if load := LOAD.search(text):
            pending[load[1]] = {load[1]}
        elif "arrive_barrier" in text:
            found += pending
            pending = {}
        else:
            for value, derived in list(pending.items()):
                if names & derived:
                    if any(use in text for use in USES):
                        del pending[value]
                    else:
                        derived |= set(re.findall(r"%\w+", text.partition(" = ")[0]))
    return found
