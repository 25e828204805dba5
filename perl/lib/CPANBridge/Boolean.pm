package CPANBridge::Boolean;

use 5.010;
use strict;
use warnings;
no if $] >= 5.035, warnings => 'experimental::builtin';

our $VERSION = '0.6.0';

# Code that checks isa('JSON::PP::Boolean'), such as JSON::PP's own encoder, accepts these as booleans
# as well. That package need not be loaded; naming it makes it exist, which isa() requires.
our @ISA = ('JSON::PP::Boolean');
{ package    # not for the indexer
    JSON::PP::Boolean; }

use overload
    'bool'   => sub { ${ $_[0] } },
    '0+'     => sub { ${ $_[0] } },
    '""'     => sub { ${ $_[0] } },
    fallback => 1;

my ($true, $false);

# JSON::PP's if the script has loaded it, so that all of a script's booleans are of one class. In Perl's global
# destruction, any of these variables may have been taken away.
sub true  { no warnings 'once'; return $INC{'JSON/PP.pm'} && $JSON::PP::true  // ($true  //= _new(1)) }
sub false { no warnings 'once'; return $INC{'JSON/PP.pm'} && $JSON::PP::false // ($false //= _new(0)) }

sub _new {
    my ($value) = @_;
    my $self = bless \$value;
    Internals::SvREADONLY($value, 1);
    return $self;
}

*_is_native = defined &builtin::is_bool ? \&builtin::is_bool : sub { 0 };

# 'true', 'false', or undef for what is not a boolean.
sub json_name {
    my ($value) = @_;
    if (my $type = ref $value) {
        if ($type eq 'SCALAR') {
            my $inner = defined ${$value} ? "${$value}" : '';
            return $inner eq '1' ? 'true' : $inner eq '0' ? 'false' : undef;
        }
        return ${$value} ? 'true' : 'false' if $type eq 'CPANBridge::Boolean';
        return $value ? 'true' : 'false'
            if $type eq 'JSON::PP::Boolean'
            || $type eq 'Types::Serialiser::Boolean'
            || $type eq 'JSON::XS::Boolean';
        return undef;
    }
    return _is_native($value) ? ($value ? 'true' : 'false') : undef;
}

1;

__END__

=head1 NAME

CPANBridge::Boolean - true and false of a reply, in Perl

=head1 SYNOPSIS

    my $answer = $bridge->call('files', 'exists', { path => $path });
    print "it is there\n" if $answer;

=head1 DESCRIPTION

JSON's C<true> and C<false> arrive as read-only objects that are 1 and 0 as a string, as a number
and as a condition. They are sent back as C<true> and C<false>.

A script that has loaded L<JSON::PP> gets that module's booleans instead, and so does one
whose replies are decoded by L<Cpanel::JSON::XS>. All these classes are C<JSON::PP::Boolean> to
C<isa>.

=head1 FUNCTIONS

=over

=item true(), false()

The two objects.

=item json_name($value)

C<'true'> or C<'false'> if C<$value> is a boolean: an object of this class, of
C<JSON::PP::Boolean> (which L<Types::Serialiser> uses too), C<\1>, C<\0>, or a boolean
of Perl 5.36 and newer such as C<!!1>. C<undef> for anything else.

=back

=cut
