"""The catalogue of bad inputs, area by area: each with the error, and the message, that must answer it."""

from . import calls, families, files, guides, judging, objectives, posteriors, training
from .case import Case, check_message
from .models import GUIDES

__all__ = ["CASES", "GUIDES", "Case", "check_message"]

AREAS = calls, guides, families, training, objectives, posteriors, judging, files
CASES: list[Case] = [case for area in AREAS for case in area.CASES]
