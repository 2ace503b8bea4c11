"""Graphics cards: one, several, and models that do not fit on one."""
