/* The block and the decoder of every format that formats.def lists. */
#ifndef DG_EVERY_FORMAT_H
#define DG_EVERY_FORMAT_H

#include "bf16.h"
#include "f16.h"
#include "f32.h"
#include "iq4_nl.h"
#include "iq4_xs.h"
#include "q2_k.h"
#include "q3_k.h"
#include "q4_0.h"
#include "q4_k.h"
#include "q5_0.h"
#include "q5_1.h"
#include "q5_k.h"
#include "q6_k.h"
#include "q8_0.h"

#endif
