"""Distillation within other frameworks' own trainers; each module needs its framework."""
