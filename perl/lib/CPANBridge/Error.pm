package CPANBridge::Error;

use 5.010;
use strict;
use warnings;

our $VERSION = '0.6.0';

use overload
    'bool'   => sub { 1 },
    '""'     => sub { $_[0]->as_string },
    fallback => 1;

sub new {
    my ($class, %fields) = @_;
    return bless {%fields}, $class;
}

# Dies with this error, or with a new one, which then has the file and line of the call in the script.
sub throw {
    my ($self, %fields) = @_;
    $self = $self->new(%fields) if !ref $self;
    if (!defined $self->{file}) {
        my ($level, @place) = (0);
        do { @place = caller $level++ } while (@place && $place[0]->isa('CPANBridge'));
        @{$self}{qw(file line)} = @place[ 1, 2 ];
    }
    die $self;
}

# Whether the bridge died with it to catch it itself. Any other exception in an eval of the
# bridge comes from a signal handler of the script, and is thrown on.
sub is_internal {
    my ($error) = @_;
    return ref $error && ref $error eq 'CPANBridge::Error' && !defined $error->{file};
}

sub message    { return $_[0]{message} }
sub error_type { return $_[0]{error_type} }
sub module     { return $_[0]{module} }
sub function   { return $_[0]{function} }
sub duration   { return $_[0]{duration} }
sub request_id { return $_[0]{request_id} }
sub traceback  { return $_[0]{traceback} }
sub retry_after { return $_[0]{retry_after} }
sub file       { return $_[0]{file} }
sub line       { return $_[0]{line} }

sub as_string {
    my ($self) = @_;
    my $message = defined $self->{message} ? $self->{message} : 'Unknown error';
    return defined $self->{file} ? "$message at $self->{file} line $self->{line}.\n" : $message;
}

1;

__END__

=head1 NAME

CPANBridge::Error - why a call failed

=head1 SYNOPSIS

    my $mean = eval { $bridge->call('stats', 'mean', [ \@values ]) };
    if (my $error = $@) {
        die $error if !ref $error || !$error->isa('CPANBridge::Error');
        warn 'No mean: ', $error->message if $error->error_type eq 'StatisticsError';
    }

=head1 DESCRIPTION

C<< $bridge->call >> dies with such an object, and C<< $bridge->get_last_error >> returns one. As a
string it is its message, followed by the script's file and line if it was thrown. Messages are character
strings; before one is printed: C<binmode STDERR, ':utf8'>.

=head1 METHODS

=over

=item new(%fields)

Creates an error of C<message>, C<error_type>, C<module>, C<function>, C<duration>, C<request_id>,
C<traceback> and C<retry_after>.

=item throw(%fields)

Creates one and dies with it. Called on an object: dies with that one.

=item message, error_type, module, function

The message, its kind (see L<CPANBridge/ERRORS>), and the call.

=item duration

How long the call took, in seconds.

=item request_id

The call's id, which the daemon's log has as well, with security events and calls that take too long. It
may be set though the call was not sent: it is undef only if no request was encoded, for example because there was no
connection.

=item traceback

Python's traceback, if the daemon runs with C<debug> on.

=item retry_after

With C<Overloaded>: the seconds after which to try again.

=item file, line

Where the script made the call; undef if the error was not thrown.

=item is_internal($error)

A function: whether the bridge died with it to catch it itself.

=item as_string

The object as a string.

=back

=cut
