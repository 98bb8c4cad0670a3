"""From `StepProgram` to `Executable`. The only caller of XLA's compiler."""
