"""Recipes, which ship with the package: `kernelpress search` tries them."""
