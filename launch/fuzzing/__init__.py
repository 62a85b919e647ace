"""The parts of `launch/fuzz.py`: inputs and what is done to them, processes and what is asked of them, kills."""
