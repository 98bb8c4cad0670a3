"""What is kept between runs: executables, and those that are loaded ahead of their use."""
