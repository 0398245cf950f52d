"""The program: arguments in, a plan, a Beam pipeline, a report and an exit code out."""
