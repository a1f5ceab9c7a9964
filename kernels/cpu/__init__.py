"""Operations in C++ for CPUs, compiled when they are first used."""
