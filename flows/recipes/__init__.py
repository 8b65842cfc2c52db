"""Recipes: one TOML file per run, and the scripts that make their data."""
