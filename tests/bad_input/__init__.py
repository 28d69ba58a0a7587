"""Bad input and faults, all made by code: every case ends in one clear line, the right code, and nothing half-written."""
