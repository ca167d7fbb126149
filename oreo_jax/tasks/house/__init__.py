"""House: find things in a room, and do something with them, turn by turn.

An episode of the default task, `>` before what the player says::

  goal put cold cup in drawer you see table box drawer fridge stove bin bed sink
  > go to drawer
  drawer is closed
  > open drawer
  in drawer you see letter
  > go to table
  on table you see lamp apple cup
  > take cup from table
  you have cup
  > go to fridge
  fridge is closed
  > cool cup
  cup is cold
  > go to drawer
  in drawer you see letter
  > put cup in drawer
  cold cup is in drawer

The goal is to put a thing somewhere, as it is, hot, clean, or cold; to put two
of a kind there; or to look at something under the lamp. The player sees what is
in a place only when it is there, and in a closed one when that is open. It has
one hand for things, knows no more than it was told, and has `max_turns` turns.
The reward is 1 for the action that reaches the goal; what makes no sense is
answered by "nothing happens".

Turns are what one wastes, and some mistakes are for good. Food is burnt when it
is heated twice, dishes break when they go from hot to cold or are heated twice,
and papers burn on the stove and get wet in the sink. Opening a place takes two
hands, so a dish in one of them falls: a player that puts a dish into a closed
place opens that first, as above. A place has room for three things, and a dish
that is put on top of them falls too. One can also eat, drop, tear, or put into
the bin what was wanted; often, but not always, there is another one.

Rooms have two to four open and two to four closed places, and the choice of
these decides the split (1,990 train, 244 validation, 266 test), so a test room
was never seen. Where things usually are is the same in all of them.

The expert knows what it was told and looks where things usually are. Problems
that it does not solve without a slip are not drawn (3.4% of all). At a turn it
slips with probability `expert_noise`: every other slip is anything possible; at
the others it forgets what it saw, or is hasty and leaves out what only pays
later. Measured over 5,000 train problems with seed 0:

| `expert_noise` | solves | turns | tokens | of the lost, for good |
| --- | --- | --- | --- | --- |
| 0 | 100% | 8.3 | 92 | |
| 0.2 | 85% | 10.2 | 110 | 37% |
| 0.4 | 65% | 11.9 | 126 | 30% |
| 0.5 | 54% | 12.7 | 135 | 27% |

At 0.4 it solves 82% of "look", 78% of "put", 59 to 65% of hot, clean and cold,
and 47% of two. No episode had more than 183 tokens. A player that takes any
possible action solves 0.2%.
"""

from oreo_jax.tasks.house.task import HouseTask, make_house

__all__ = ["HouseTask", "make_house"]
