// The list of layouts: the names always, the bodies where an instruction set asks for them (RK_BODIES).
#define RK_LAYOUTS(X) X(bitmask) X(block) X(nofm) X(dense) X(lowrank) X(spectral)
#ifdef RK_BODIES
#include "linear/vector.inl"
#include "linear/number.inl"
#include "linear/tile.inl"
#include "linear/epilogue.inl"
#include "layernorm.inl"
#include "linear/panel.inl"
#include "linear/strips.inl"
#include "linear/bitmask.inl"
#include "linear/block.inl"
#include "linear/picks.inl"
#include "linear/nofm.inl"
#include "linear/dense.inl"
#include "linear/lowrank.inl"
#include "linear/spectral.inl"
#include "linear/normed.inl"
#include "linear/mlp.inl"
#include "attention.inl"
#define RK_FIELD(name) {name##_linear, name##_width},
#define RK_TABLE(isa) {isa, attention, layernorm, normed, mlp, RK_LAYOUTS(RK_FIELD)}
#endif
