"""Rows of training data, drawn on the device without a synchronisation, so that a CUDA graph can hold them.

A row is `<s>`, an introduction, lines (needles and noise in random order), then questions with their answers
until the row is full. What varies from row to row: the number of lines, the share and the places of the
needles, the form of the lines, the kind of the task, the keys; so nothing can be learnt by position.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dashbench.miniature.pieces import Pieces

KINDS = ("single", "multiquery", "multivalue", "track")

NAMES, ANSWERS = 7, 9
"""Slots of a question's names (four and three separators) and of its answer (five and four separators)."""


@dataclass
class Mix:
    """What a batch is made of; tensors, so that a captured graph follows when they change.

    Attributes:
        kinds: (4,) shares of single, multiquery, multivalue, track.
        short_form: share of rows whose lines and questions are only `KEY is: VALUE`.
        short_key: share of rows whose keys are one word.
        needles_only: share of rows without noise.
        few: share of rows with at most eight needles.
    """

    kinds: Tensor
    short_form: Tensor
    short_key: Tensor
    needles_only: Tensor
    few: Tensor


def mix(device: str, kinds=(1.0, 0, 0, 0), short_form=0.0, short_key=0.0, needles_only=0.5, few=0.3) -> Mix:
    """A mix on a device, from plain numbers."""
    values = [torch.tensor(v, device=device, dtype=torch.float32) for v in (kinds, short_form, short_key)]
    return Mix(*values, *(torch.tensor(v, device=device) for v in (needles_only, few)))


@dataclass
class Batch:
    """Tokens and where their answers are.

    Attributes:
        tokens: (rows, length) int64.
        answers: (rows, length) int8; what the token is: 0 not asked for, 1 part of an answer, 2 what ends it,
            3 the space before it.
        question: (rows, length) int32 number of the question whose answer the token is part of; -1 elsewhere.
        kind: (rows,) index into KINDS.
    """

    tokens: Tensor
    answers: Tensor
    question: Tensor
    kind: Tensor


def draw_rows(pieces: Pieces, mixture: Mix, rows: int, length: int) -> Batch:
    """Draws a batch.

    Args:
        pieces: the table, on the device of the batch.
        mixture: on the same device.
        rows: how many.
        length: of each, in tokens.
    """
    device = pieces.tokens.device
    t, where = pieces.template, torch.where
    lines = max(6, length // 9)
    questions = max(2, min(length // 20, 64))
    uniform = lambda *shape: torch.rand(*shape, device=device)  # noqa: E731

    kind = (uniform(rows, 1) > (mixture.kinds / mixture.kinds.sum()).cumsum(0)[:-1]).sum(1)
    single, asks_four, has_four, track = (kind == i for i in range(4))
    members = where(has_four, 4, where(track, 5, 1))
    short_form = (uniform(rows) < mixture.short_form) & single
    short_key = (uniform(rows) < mixture.short_key) & ~track
    needles_only = (uniform(rows) < mixture.needles_only) & ~track
    inside = (uniform(rows) < 0.5) & ~needles_only & ~short_form
    many = asks_four | has_four

    # How many lines: lengths are known on average only, so the end of a row may cut its last questions off.
    line_length = torch.where(short_form, 11.0, torch.where(track, 22.0, 19.0)) - 3.0 * short_key
    share = 0.15 + 0.65 * uniform(rows)
    line_count = (share * (length - 30) / line_length).clamp(min=2.0).clamp(max=lines).long()
    line_count = torch.maximum(line_count, members + 1)

    # Which lines are needles, in random order: the order says who belongs together.
    few = uniform(rows) < mixture.few
    wanted = torch.where(few, 1 + 7 * uniform(rows), 1 + uniform(rows) * line_count)
    wanted = torch.where(needles_only, line_count.float(), wanted).long()
    wanted = torch.maximum(wanted, torch.where(asks_four, 4, members))
    wanted = torch.where(track, (wanted // 5).clamp(1, 8) * 5, wanted)
    place = torch.arange(lines, device=device)
    score = uniform(rows, lines).masked_fill(place >= line_count[:, None], 2.0)
    order = score.argsort(1)  # rank -> line
    rank = order.argsort(1)  # line -> rank
    count = torch.minimum(wanted, line_count)
    needle = rank < count[:, None]
    groups = count // members
    group = rank // members[:, None]

    def members_in_order(index: Tensor, size: int) -> Tensor:
        """(rows, questions, size) lines of the group with number `index`, in the order of the text."""
        ranks = index[..., None] * members[:, None, None] + torch.arange(size, device=device)
        beyond = torch.arange(size, device=device) >= members[:, None, None]
        chosen = order.gather(1, ranks.clamp(max=lines - 1).flatten(1)).view(ranks.shape)
        return chosen.masked_fill(beyond, lines - 1).sort(-1).values

    def draws(name: str, index: Tensor) -> Tensor:
        """Distinct pieces of a group for distinct indices of one row."""
        first, size = pieces.groups[name]
        step = 2 * torch.randint(1, 400, (rows, 1), device=device) + 1
        start = torch.randint(0, size, (rows, 1), device=device)
        return first + (start + index * step) % size

    pick = lambda flag, yes, no: torch.where(flag.view(-1, *[1] * (yes.dim() - 1)), yes, no)  # noqa: E731
    key = pick(short_key, draws("short_keys", group), draws("keys", group))
    value = draws("values", rank)
    variable = draws("variables", rank)
    chain_value = draws("short_values", group)
    # The line before in the same chain: the nearest earlier line with the same group.
    chain = members_in_order(torch.arange(8, device=device).expand(rows, 8), 5)
    before = torch.cat([chain.new_full((rows, 8, 1), -1), chain[..., :-1]], -1)
    # Rows of other kinds write nonsense here that nothing reads.
    previous = torch.full((rows, lines), -1, device=device).scatter(1, chain.flatten(1), before.flatten(1))
    previous_variable = variable.gather(1, previous.clamp(min=0))

    full = lambda name, *shape: torch.full(shape, t[name], device=device)  # noqa: E731
    tr, sf, ins = track[:, None], short_form[:, None], inside[:, None]
    shape = (rows, lines)
    first_of_chain = previous < 0
    n = lambda name: full(name, *shape)  # noqa: E731
    sentence = draws("sentences", place.expand(rows, lines))
    repeated = (uniform(rows) < 0.5)[:, None]
    noise = where(ins, where(repeated, n("repeated_inside"), sentence), n("repeated"))
    noise = where(tr, n("repeated_track"), noise)
    slots = [
        where(tr, n("variable"), where(sf, n("nothing"), where(ins, n("needle_inside"), n("needle")))),
        where(tr, variable, key),
        where(tr, where(first_of_chain, n("equals"), n("equals_variable")), n("needle_is")),
        where(tr, where(first_of_chain, chain_value, previous_variable), value),
        where(
            tr,
            where(first_of_chain, n("nothing"), n("space")),
            where(sf, n("short_end"), n("needle_end")),
        ),
    ]
    slots = [where(needle, slot, t["nothing"]) for slot in slots]
    slots[0] = where(needle, slots[0], noise)
    line_pieces = torch.stack(slots, -1).masked_fill((place >= line_count[:, None])[..., None], t["nothing"])

    one = lambda name: full(name, rows, 1)  # noqa: E731
    some = many[:, None]
    intro = torch.cat(
        [
            one("begin"),
            where(tr, one("track_intro"), where(some, one("intro_some_a"), one("intro_one_a"))),
            where(tr, one("nothing"), where(some, one("intro_some_b"), one("intro_one_b"))),
        ],
        1,
    )
    intro = torch.cat([intro[:, :1], where(sf, t["nothing"], intro[:, 1:])], 1)

    # Questions: a group each; four groups each when four keys are asked for.
    each = where(asks_four, 4, 1)
    number = torch.arange(questions, device=device)
    asked = number * each[:, None]
    valid = asked + each[:, None] <= groups[:, None]
    of = lambda table, index: table.gather(1, index.clamp(0, table.shape[1] - 1).flatten(1)).view(index.shape)  # noqa: E731
    q = lambda name, *more: full(name, rows, questions, *more)  # noqa: E731
    quad = asked[..., None] + torch.arange(4, device=device)
    quad_line = of(order, quad)
    member_line = members_in_order(asked, 5)
    key_of = of(key, quad_line)
    names = [q("nothing")] * NAMES
    a4, h4, s4 = asks_four[:, None], has_four[:, None], short_form[:, None]
    names[0] = where(
        tr, of(chain_value, member_line[..., 0]), where(a4, key_of[..., 0], of(key, member_line[..., 0]))
    )
    for i in (1, 2, 3):
        names[2 * i - 1] = where(a4, q("name_and" if i == 3 else "name_comma"), names[1])
        names[2 * i] = where(a4, key_of[..., i], q("nothing"))
    names[1] = where(a4, q("name_comma"), q("nothing"))
    answers = [q("nothing")] * ANSWERS
    four_values = where(a4[..., None], of(value, quad_line), of(value, member_line[..., :4]))
    five_variables = of(variable, member_line)
    for i in range(5):
        plain = four_values[..., i] if i < 4 else q("nothing")
        present = (a4 | h4) if i else torch.ones_like(a4)
        answers[2 * i] = where(tr, five_variables[..., i], where(present, plain, q("nothing")))
        if i:
            separator = where((a4 | h4) & (i < 4), q("comma"), q("nothing"))
            answers[2 * i - 1] = where(tr, q("nothing"), separator)
    names, answers = torch.stack(names, -1), torch.stack(answers, -1)
    ask = where(tr, q("track_ask"), where(some, q("ask_some"), q("ask_one")))
    middle = where(tr, q("track_answer"), where(some, q("answer_some"), q("answer_one")))
    count_of = where(tr, q("track_count"), q("nothing"))
    last = where(tr, q("track_are"), where(some, q("are"), q("is")))
    last = where(s4, q("short_is"), last)
    gap = where(tr, q("nothing"), q("space"))
    end = where(tr, q("track_end"), where(s4, q("short_end"), q("end")))
    ask, middle = (where(s4, q("nothing"), part) for part in (ask, middle))
    names_again = names
    names = where(s4[..., None], t["nothing"], names)
    question_pieces = torch.cat(
        [
            *(ask[..., None], names, middle[..., None], count_of[..., None], names_again),
            *(last[..., None], gap[..., None], answers, end[..., None]),
        ],
        -1,
    ).masked_fill(~valid[..., None], t["nothing"])
    per_question = question_pieces.shape[-1]
    sizes = (per_question - ANSWERS - 2, 1, ANSWERS, 1)
    role = torch.cat(
        [
            torch.full((size,), r, device=device, dtype=torch.int8)
            for size, r in zip(sizes, (0, 3, 1, 2), strict=True)
        ]
    )

    plan = torch.cat([intro, line_pieces.flatten(1), question_pieces.flatten(1)], 1)
    head = plan.shape[1] - questions * per_question
    roles = torch.cat([role.new_zeros(head), role.repeat(questions)])
    owner = torch.cat(
        [number.new_full((head,), -1), number[:, None].expand(questions, per_question).flatten()]
    )
    return _look_up(pieces, plan, roles, owner, kind, length)


def _look_up(pieces: Pieces, plan: Tensor, roles: Tensor, owner: Tensor, kind: Tensor, length: int) -> Batch:
    """Tokens of the pieces in `plan` (rows, slots), one after the other, cut or padded to `length`."""
    sizes = pieces.lengths[plan].long()
    ends = sizes.cumsum(1)
    position = torch.arange(length, device=plan.device).expand(plan.shape[0], length).contiguous()
    slot = torch.searchsorted(ends, position, right=True)
    beyond = slot >= plan.shape[1]
    slot = slot.clamp(max=plan.shape[1] - 1)
    offset = position - (ends - sizes).gather(1, slot)
    tokens = pieces.tokens[plan.gather(1, slot), offset.clamp(max=pieces.tokens.shape[1] - 1)].long()
    padding = pieces.tokens[pieces.template["track_end"], 0].long()
    answers = roles[slot].masked_fill(beyond, 0)
    return Batch(
        tokens=torch.where(beyond, padding, tokens),
        answers=answers,
        question=torch.where(answers > 0, owner[slot], -1).int(),
        kind=kind,
    )
