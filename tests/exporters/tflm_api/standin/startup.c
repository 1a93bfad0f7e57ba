/* Vector table of an emulated Cortex-M board whose memory starts at 0: the C library's _start does the rest. */
extern void _start(void);
extern unsigned char _stack_top[];

static void reset(void) {
  _start();
  for (;;) {
  }
}

__attribute__((section(".vectors"), used)) static const void *const vectors[16] = {_stack_top, (const void *)reset};
