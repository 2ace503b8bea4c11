"""Measurements on models that people have, apart from the study's own small ones."""
