"""The attacks of AutoAttack (Croce & Hein 2020, arXiv 2003.01690) on the fast engine."""
