"""The attacks of AutoAttack (Croce & Hein 2020, arXiv 2003.01690), each a `Search`, and how they are put together."""
