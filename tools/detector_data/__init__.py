"""Generated passages with labelled sensitive parts: a training world and a held-out one."""
