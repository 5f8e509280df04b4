"""Methods whose gates or choices held-out rows train: those of iHAS, AdaFS, AutoField and AutoDim."""
