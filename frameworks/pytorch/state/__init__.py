"""Where training state lies: one copy for torch and the program, divided, offloaded, or moved ahead of its use."""
