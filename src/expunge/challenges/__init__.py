"""Hard cases: forget sets, poisonings and confusions that tell methods apart where accuracy on random sets cannot."""
