"""What the subcommands of ``meta-peft`` do; heavy libraries are imported when a command runs."""
