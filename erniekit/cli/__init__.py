"""The front door: the command `erniekit`. Nothing heavy is loaded before a verb is chosen."""
