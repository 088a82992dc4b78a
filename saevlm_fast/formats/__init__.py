"""Files of SAEs: those of every library become one plain form, and the plain form is written as theirs."""
