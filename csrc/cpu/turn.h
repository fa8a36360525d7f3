// How far a token's output turns its residual stream: EASY-EP's weight of a token.
#pragma once

#include "../turn.h"
#include "slots.h"

namespace moekern::cpu {

// The lanes of three dots of two rows h and out.
struct Dots {
  Floats hh_a = {}, hh_b = {}, ho_a = {}, ho_b = {}, oo_a = {}, oo_b = {};
};

template <class T>
MOEKERN_INLINE void add_dots(const T* h, const T* out, Dots& dots) {
  Floats ha, hb, oa, ob;
  unpack(h, ha, hb);
  unpack(out, oa, ob);
  dots.hh_a += ha * ha;
  dots.hh_b += hb * hb;
  dots.ho_a += ha * oa;
  dots.ho_b += hb * ob;
  dots.oo_a += oa * oa;
  dots.oo_b += ob * ob;
}

// Of 32 columns in their own order, halves upon each other down to one: unpacked halves have the even ones in a and c.
MOEKERN_INLINE double sum_of_dots(const Floats& a, const Floats& b, const Floats& c, const Floats& d, const float*) {
  return sum_of_lanes((a + c) + (b + d));
}
template <class Half>
MOEKERN_INLINE double sum_of_dots(const Floats& a, const Floats& b, const Floats& c, const Floats& d, const Half*) {
  return sum_of_lanes(a + c) + sum_of_lanes(b + d);
}

// How far a token's output, as it was rounded, turns its residual.
template <class T>
MOEKERN_INLINE double turn_of(const CombineAndMeasure& args, int64_t t) {
  const T *h = static_cast<const T*>(args.residual) + t * args.H, *out = static_cast<const T*>(args.out) + t * args.H;
  Dots first, second;
  int64_t i = 0;
  for (; i + kLanes <= args.H; i += kLanes) {
    add_dots(h + i, out + i, first);
    add_dots(h + i + kLanes / 2, out + i + kLanes / 2, second);
  }
  if (i < args.H) {
    T tails[2][kLanes] = {};
    std::memcpy(tails[0], h + i, (args.H - i) * sizeof(T));
    std::memcpy(tails[1], out + i, (args.H - i) * sizeof(T));
    add_dots(tails[0], tails[1], first);
    add_dots(tails[0] + kLanes / 2, tails[1] + kLanes / 2, second);
  }
  return turned(sum_of_dots(first.hh_a, first.hh_b, second.hh_a, second.hh_b, h),
                sum_of_dots(first.ho_a, first.ho_b, second.ho_a, second.ho_b, h),
                sum_of_dots(first.oo_a, first.oo_b, second.oo_a, second.oo_b, h));
}

}  // namespace moekern::cpu
