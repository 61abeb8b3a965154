"""Where other libraries' extension points are met: thin, and gated on their versions."""
