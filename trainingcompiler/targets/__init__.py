"""For which devices a program is compiled. No programs."""
