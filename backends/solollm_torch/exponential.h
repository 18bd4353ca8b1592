/* e^x = 2^n e^r, with n the whole number nearest to x / ln(2) and r = x - n ln(2) taken in two parts:
 * constants and polynomial are those of Cephes' expf, good to 2 units in the last place. For floats
 * and for vectors of them: how 2^n is made is what differs. */

#define LOG2_E 1.44269504088896341f
#define LN_2_HIGH 0.693359375f
#define LN_2_LOW (-2.12194440e-4f)

/* e^r for |r| <= ln(2)/2. */
#define EXP_NEAR_0(r)                                                                              \
    ((((((1.9875691500e-4f * (r) + 1.3981999507e-3f) * (r) + 8.3334519073e-3f) * (r) +             \
        4.1665795894e-2f) * (r) + 1.6666665459e-1f) * (r) + 5.0000001201e-1f) * (r) * (r) +        \
     (r) + 1.0f)
