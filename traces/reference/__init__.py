"""How the bundled reference recording was made from the full one."""
