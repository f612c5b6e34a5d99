"""EvNAS on NAS-Bench-201 (Dong & Yang, ICLR 2020): the same search loop on a space whose true accuracies are known."""
