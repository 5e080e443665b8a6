"""The conditions of 2512.18209 as measurements on any model: D1 to D7, and one report."""
