"""Methods whose gates or choices held-out rows train: iHAS, AdaFS, AutoField, AutoDim, AutoEmb, ESAPN, AutoSrh."""
