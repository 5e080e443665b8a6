"""The conditions of 2512.18209 as measurements on any model: D1 to D6, and one report."""
