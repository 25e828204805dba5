package CPANBridge::Clock;

use 5.010;
use strict;
use warnings;

use Errno qw(EINTR);
use Time::HiRes ();

our $VERSION = '0.6.0';

# A clock that setting the date does not change; without one, the time of day.
use constant MONOTONIC => scalar eval {
    local $SIG{__DIE__};
    my $clock = Time::HiRes::CLOCK_MONOTONIC();
    Time::HiRes::clock_gettime($clock) > 0 ? $clock : undef;
};

sub now { return defined MONOTONIC ? Time::HiRes::clock_gettime(MONOTONIC) : Time::HiRes::time() }

# Signals interrupt select; the pause continues afterwards.
sub pause_until {
    my ($moment) = @_;
    while ((my $left = $moment - now()) > 0) {
        select undef, undef, undef, $left;
    }
    return;
}

# The set of this one handle, as select takes it.
sub handle_set {
    my ($handle) = @_;
    my $set = '';
    vec($set, fileno $handle, 1) = 1;
    return $set;
}

# Waits until the one handle of the set is ready or the moment has come. Returns (readable, writable).
sub wait_for {
    my ($set, $for_writing, $moment) = @_;
    while (1) {
        my $left = $moment - now();
        return if $left <= 0;
        my ($readable, $writable) = ($set, $for_writing ? $set : undef);
        my $ready = select $readable, $writable, undef, $left;
        return ($readable =~ tr/\0//c, $for_writing && $writable =~ tr/\0//c) if $ready > 0;
        return (1, 1) if $ready < 0 && $! != EINTR;    # read and write report the error
    }
}

1;

__END__

=head1 NAME

CPANBridge::Clock - waiting with a deadline

=head1 DESCRIPTION

All moments are seconds of C<now()>, a clock that only goes forward. No function here uses C<alarm>
or changes C<$SIG{ALRM}>, so they can be used in scripts that do. A signal does not shorten a wait.

=head1 FUNCTIONS

=over

=item now()

The present moment, with a fraction.

=item pause_until($moment)

Returns when the moment has come.

=item handle_set($handle)

The first argument of C<wait_for>; valid as long as the handle is open.

=item wait_for($set, $for_writing, $moment)

Waits until the handle can be read (or, with a true C<$for_writing>, written). Returns two booleans,
readable and writable; none when the moment has come.

=back

=cut
