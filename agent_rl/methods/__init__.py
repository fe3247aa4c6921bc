"""Methods by name: a method chooses trajectories, teacher signal, objective and guards. One file each."""

from agent_rl.methods.user_hindsight import UserHindsight

METHODS = {"user_hindsight": UserHindsight}
