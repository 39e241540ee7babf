// The 16-bit types of emulation.hpp in plain C++: conversions, and the fused multiply-add of two of them.
#include <cmath>

template <class T>
float widen(T, unsigned short bits) {
    const int exponent = bits >> T::MANTISSA & (2 * T::BIAS + 1), mantissa = bits & ((1 << T::MANTISSA) - 1);
    const float sign = bits & 0x8000 ? -1 : 1;
    if (exponent == 2 * T::BIAS + 1) return mantissa ? NAN : sign * INFINITY;
    if (exponent == 0) return sign * std::ldexp(float(mantissa), 1 - T::BIAS - T::MANTISSA);
    return sign * std::ldexp(float(mantissa + (1 << T::MANTISSA)), exponent - T::BIAS - T::MANTISSA);
}
template <class T>
unsigned short narrow(T, double value) {
    const unsigned sign = std::signbit(value) ? 0x8000 : 0;
    constexpr unsigned INFINITE = (2 * T::BIAS + 1) << T::MANTISSA;
    if (std::isnan(value)) return 0x7fff;
    if (std::isinf(value)) return sign | INFINITE;
    if (value == 0) return sign;
    const int exponent = max(std::ilogb(value), 1 - T::BIAS);
    // Of the units of its exponent, to the nearest, ties to even; a carry moves to the next exponent.
    const double units = std::nearbyint(std::ldexp(std::fabs(value), T::MANTISSA - exponent));
    const unsigned bits = unsigned(units) + ((exponent + T::BIAS - 1) << T::MANTISSA);
    return sign | min(bits, INFINITE);
}
template <class T>
unsigned fma2(T, unsigned a, unsigned b, unsigned c) {
    unsigned result = 0;
    for (int half = 0; half < 32; half += 16) {
        const double d = std::fma(double(widen(T{}, a >> half)), double(widen(T{}, b >> half)),
                                  double(widen(T{}, c >> half)));
        result |= unsigned(narrow(T{}, d)) << half;
    }
    return result;
}

template float widen(Float16, unsigned short);
template float widen(BFloat16, unsigned short);
template unsigned short narrow(Float16, double);
template unsigned short narrow(BFloat16, double);
template unsigned fma2(Float16, unsigned, unsigned, unsigned);
template unsigned fma2(BFloat16, unsigned, unsigned, unsigned);
