"""AdaFS (Lin et al. 2022): a controller weighs the fields of each row (soft) or keeps the heaviest of them (hard)."""
