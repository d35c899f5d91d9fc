"""`press`: a recipe, a list of steps, becomes a smaller, faster model and a report; what is done stays done."""

from kernelpress.press.reading import load_recipe
from kernelpress.press.recipe import Recipe, RecipeError
from kernelpress.press.registry import Pass, PassContext, known_passes, register
from kernelpress.press.run import REPORT_HTML, REPORT_JSON, RequirementError, press
from kernelpress.press.searches import search
from kernelpress.press.sections import Section
from kernelpress.press.sweeps import SweepError, sweep

__all__ = [
    "REPORT_HTML",
    "REPORT_JSON",
    "Pass",
    "PassContext",
    "Recipe",
    "RecipeError",
    "RequirementError",
    "Section",
    "SweepError",
    "known_passes",
    "load_recipe",
    "press",
    "register",
    "search",
    "sweep",
]
