"""Several policies that speak with each other in turns, and learn from it.

A game says who speaks, what each speaker sees and what a turn earns (`game.py`); agents are
adapters of one backbone that play it (`players.py`), also against their past selves (`pool.py`),
and learn from their own turns alone (`learner.py`, `training.py`); who beats whom along the run is
a matrix (`matrix.py`). Two games are shipped.
"""

from .config import MultiAgentConfig
from .game import Dialogue, Game, Turn
from .matrix import WinRates
from .pool import Pool
from .proposer_solver import ProposerSolver
from .records import MultiAgentSummary
from .reference_game import ReferenceGame
from .training import MultiAgentTrainer

__all__ = [
    "Dialogue",
    "Game",
    "MultiAgentConfig",
    "MultiAgentSummary",
    "MultiAgentTrainer",
    "Pool",
    "ProposerSolver",
    "ReferenceGame",
    "Turn",
    "WinRates",
]
